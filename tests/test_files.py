"""Files are replaced as a whole."""
import pytest

from mmeffformer.files import replacing


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'deep' / 'file.json'
    with replacing(path) as half:
        half.write_text('one')
        assert not path.exists() and half.suffix == '.json'
    with pytest.raises(KeyboardInterrupt), replacing(path) as half:
        half.write_text('tw')
        raise KeyboardInterrupt
    assert path.read_text() == 'one'
    assert [*path.parent.iterdir()] == [path]
