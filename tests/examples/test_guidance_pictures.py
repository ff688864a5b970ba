import guidance_pictures
import pytest
import quickstart
from PIL import Image


@pytest.mark.slow
def test_paints_with_each_remedy(tmp_path, capsys):
    quickstart.main(tmp_path, sizes=quickstart.Sizes(24, 2, 2, 2, images_per_prompt=2, num_inference_steps=2))
    shares = guidance_pictures.main(tmp_path, seeds=2)
    text = capsys.readouterr().out
    assert set(shares) == set(guidance_pictures.REMEDIES)
    assert len(set(shares.values())) == 3
    for name, share in shares.items():
        assert 0 <= share <= 1
        assert f"| {name} | {share:.1%} |" in text
    with Image.open(tmp_path / "guidance.png") as sheet:
        assert sheet.width > 3 * 2 * 64


def test_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="run examples/quickstart"):
        guidance_pictures.main(tmp_path)
