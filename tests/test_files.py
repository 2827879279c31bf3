"""lab/files.py: atomic writes."""

from lab.errors import UserError
from lab.files import write_atomically

import pytest


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "device").symlink_to("/dev/full")
    with pytest.raises(UserError, match="not a regular file"):
        write_atomically(tmp_path / "device", b"x")
    assert (tmp_path / "device").is_symlink()
