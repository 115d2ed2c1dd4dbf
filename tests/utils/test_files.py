"""Files are replaced as a whole."""
import pytest

from mmeffformer.utils.files import atomic_write


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'deep' / 'file.json'
    with atomic_write(path) as tmp_path:
        tmp_path.write_text('one')
        assert not path.exists() and tmp_path.suffix == '.json'
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as tmp_path:
        tmp_path.write_text('tw')
        raise KeyboardInterrupt
    assert path.read_text() == 'one'
    assert [*path.parent.iterdir()] == [path]
