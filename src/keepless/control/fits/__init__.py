"""What fits: the largest batch, length or depth for which there is a plan within a budget."""

from keepless.control.fits.depth import with_depth as with_depth
from keepless.control.fits.doors import fits_grid as fits_grid
from keepless.control.fits.doors import max_batch as max_batch
from keepless.control.fits.doors import max_depth as max_depth
from keepless.control.fits.doors import max_length as max_length
from keepless.control.fits.grid import FitsGrid as FitsGrid
from keepless.control.fits.grid import GridCell as GridCell
from keepless.control.fits.result import Fits as Fits
from keepless.control.fits.result import SizeTried as SizeTried
