"""The table of devices, names that people write, and files of hypothetical ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from keepless.cost import DeviceSpec, find_device, known_devices
from keepless.cost.devices import read_device
from keepless.errors import DeviceError

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is part of Python from 3.11 on")


def test_every_device_of_the_table_is_whole_and_has_a_source() -> None:
    """Rates rise as dtypes shrink, memory is less than on the box, and each row says where it comes from."""
    table = known_devices()
    assert len(table) >= 25
    for device in table.values():
        assert device.source.startswith("NVIDIA")
        assert "https://" in device.source
        assert 8 << 30 < device.usable_nbytes < device.memory_nbytes
        assert device.rate("float32") <= device.rate("float32", tf32=True)
        assert device.rate("float32", tf32=True) <= device.rate("float16") <= device.rate("float8_e4m3fn")
        assert device.rate("float64") < device.rate("float32")
        assert device.capability >= (7, 0)
        assert device.links["pcie"].bytes_per_s < device.bandwidth


def test_cards_without_bfloat16_units_compute_it_at_the_rate_of_float32() -> None:
    """T4 and V100 have no bfloat16 tensor cores."""
    for name in ("t4", "v100-32"):
        assert find_device(name).rate("bfloat16") == find_device(name).rate("float32")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_names_as_people_and_drivers_write_them(written: str, name: str) -> None:
    assert find_device(written).name == name
    assert find_device(find_device(written)) is find_device(name)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(DeviceError, match=r"no device 'rtx409' in the table\. Near it: rtx4090, .*--device FILE\.toml"):
        find_device("rtx409")
    with pytest.raises(DeviceError, match="is of type int; give a name"):
        find_device(4090)  # type: ignore[arg-type]


def test_devices_come_back_from_their_values() -> None:
    for device in known_devices().values():
        assert read_device(json.loads(json.dumps(device.as_dict()))) == device


def written(folder: Path, text: str, name: str = "card.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@needs_toml
def test_a_file_changes_a_known_device(tmp_path: Path) -> None:
    """What it does not name is the known card's; tables are merged, aliases are not taken over."""
    file = written(
        tmp_path,
        """
        like = "rtx4090"
        memory = "48GiB"
        source = "a guess"
        [rates]
        bfloat16 = 120e12
        [efficiency]
        matmul = [0.9, 0.8]
        """,
    )
    device, base = find_device(file), find_device("rtx4090")
    assert device == find_device(str(file))
    assert (device.name, device.memory_nbytes, device.bandwidth) == ("card", 48 << 30, base.bandwidth)
    assert (device.rate("bfloat16"), device.rate("float16")) == (120e12, base.rate("float16"))
    assert device.efficiency["matmul"].compute == 0.9
    assert device.efficiency["conv"] == base.efficiency["conv"]
    assert device.aliases == ()


WHOLE = {"memory": "24GiB", "bandwidth": 1e12, "rates": {"float32": 80e12}, "source": "a guess"}


def test_a_whole_device_in_a_json_file(tmp_path: Path) -> None:
    file = written(tmp_path, json.dumps(WHOLE | {"name": "mine", "context": "400MiB"}), "mine.json")
    device = find_device(file)
    assert isinstance(device, DeviceSpec)
    assert (device.name, device.usable_nbytes) == ("mine", (24 << 30) - (400 << 20))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory": None}, "the key 'memory' is missing"),
        ({"memory": "lots"}, "memory: it is no number of bytes"),
        ({"memory": 1.5}, "memory: it is 1.5; write a whole number of bytes"),
        ({"memory": True}, "memory: it is no number of bytes"),
        ({"context": "25GiB"}, "context: it is 26843545600 bytes, and the memory has 25769803776"),
        ({"bandwidth": 0}, "bandwidth: it is 0; it must be from 1"),
        ({"bandwidth": "fast"}, "bandwidth: it is 'fast'; write a number"),
        ({"rates": {"bfloat16": 1e12}}, "rates: the key 'float32' is missing"),
        ({"rates": {"float32": 1e12, "int3": 1e12}}, "rates: the key 'int3' is not known"),
        ({"rates": [1]}, "rates: it is a list, not an object"),
        ({"capability": "nine"}, "capability: it is 'nine'; write it as"),
        ({"type": "tpu"}, "type: it is the text 'tpu', which is none of cuda, cpu"),
        ({"efficiency": {"matmul": [0.5]}}, "efficiency.matmul: it is not a pair"),
        ({"efficiency": {"dreams": [0.5, 0.5]}}, "efficiency: the key 'dreams' is not known"),
        ({"links": {"pcie": {"bytes_per_second": -1}}}, "links.pcie.bytes_per_second: it is -1"),
        ({"launch_seconds": 5}, "launch_seconds: it is 5; seconds are from 0 to 1"),
        ({"spread": -1}, "spread: it is -1"),
        ({"price": 1}, "the key 'price' is not known"),
        ({"like": "rtx409"}, "no device 'rtx409'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, change: dict[str, object], says: str) -> None:
    row = {key: value for key, value in (WHOLE | change).items() if value is not None}
    with pytest.raises(DeviceError, match=r"card\.json' cannot be used") as caught:
        find_device(written(tmp_path, json.dumps(row), "card.json"))
    assert says in str(caught.value)


@needs_toml
@pytest.mark.parametrize("text", ["name =", "\x00", "a = 1\na = 2", "rates = {float32 = nan}"])
def test_files_that_are_no_toml_or_hold_no_numbers(tmp_path: Path, text: str) -> None:
    with pytest.raises(DeviceError, match="cannot be used"):
        find_device(written(tmp_path, text))


def test_missing_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_device(tmp_path / "none.toml")
    with pytest.raises(DeviceError, match="more than 1048576 bytes"):
        find_device(written(tmp_path, " " * (1 << 21), "huge.json"))
