"""Prompts from a file, and pictures of them in GenEval's layout."""

import json

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from tests import tiny
from uae_jax import from_text, reconstruct
from uae_jax.errors import UserError


@pytest.fixture
def flags():
    """Flags as they were."""
    saved = flagsaver.save_flag_values(reconstruct.FLAGS)
    yield
    flagsaver.restore_flag_values(saved, reconstruct.FLAGS)


def test_prompts_of_a_file(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(" a red circle \n\n{not json\n")
    assert from_text.read_prompts(text) == [{"prompt": "a red circle"}, {"prompt": "{not json"}]
    lines.write_text('{"prompt": "a", "tag": "colors", "include": [{"count": 1}]}\n')
    assert from_text.read_prompts(lines) == [{"prompt": "a", "tag": "colors", "include": [{"count": 1}]}]
    for bad in ("{", '{"tag": "x"}', '{"prompt": 1}', "[1]"):
        lines.write_text(f'{{"prompt": "a"}}\n{bad}\n')
        with pytest.raises(UserError, match=r"b.jsonl, line 2: expected") as caught:
            from_text.read_prompts(lines)
        assert "\n" not in str(caught.value)
    text.write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        from_text.read_prompts(text)
    with pytest.raises(UserError, match="cannot be read"):
        from_text.read_prompts(tmp_path / "none")


def test_a_picture_depends_on_its_place_and_the_seed(tmp_path):
    prompts = [{"prompt": f"p{i}", "tag": i} for i in range(3)]
    asked = []

    def draw(texts, keys):
        asked.append(texts)
        colours = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (3,))))(keys)
        return np.broadcast_to(np.asarray(colours)[:, :, None, None], (*keys.shape, 4, 4, 3))

    def drawn(name, **settings):
        from_text.write(draw, prompts, tmp_path / name, **settings)
        files = sorted((tmp_path / name).glob("*/samples/*.png"))
        return {str(file.relative_to(tmp_path / name)): np.asarray(Image.open(file)).tolist() for file in files}

    one = drawn("one", samples=2, batch=2, seed=1)
    assert list(one) == [f"{i:05}/samples/{k:05}.png" for i in range(3) for k in range(2)]
    assert len({str(picture) for picture in one.values()}) == 6
    assert asked == [["p0", "p1"], ["p2", "p2"]]
    assert json.loads((tmp_path / "one" / "00002" / "metadata.jsonl").read_text()) == prompts[2]
    more = drawn("more", samples=3, batch=3, seed=1)
    assert all(more[name] == picture for name, picture in one.items())
    assert drawn("other", samples=2, batch=2, seed=2) != one


@pytest.mark.parametrize(
    "arguments",
    [["x.png"], ["--workdir=x"], ["--workdir=x", "--from_text=y", "x.png"], ["--workdir=x", "--samples=2", "x"]],
)
def test_usage(flags, arguments):
    with pytest.raises(UserError, match="usage"):
        reconstruct.main(["", *arguments])


def test_a_condition_that_has_seen_a_picture(tmp_path):
    config = tiny.config(tmp_path, condition_source="in_context")
    with pytest.raises(UserError, match="conditions on a picture"):
        from_text.by_system(config, None, None, None, [])
