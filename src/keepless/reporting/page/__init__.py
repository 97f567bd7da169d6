"""The report: one self-contained page, the same as JSON, and as a page in a terminal.

`data` says what a report holds, `build` makes it of a plan, `codec` reads and writes it, `html` and `terminal` show it.
"""

from keepless.reporting.page.build import report_data as report_data
from keepless.reporting.page.curve import curve_data as curve_data
from keepless.reporting.page.data import ReportData as ReportData
from keepless.reporting.page.html import check_report_path as check_report_path
from keepless.reporting.page.html import load_report as load_report
from keepless.reporting.page.html import report_page as report_page
from keepless.reporting.page.html import save_report as save_report
from keepless.reporting.page.terminal import terminal_page as terminal_page
