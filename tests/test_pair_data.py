"""Pairs of a dataset that TFDS has prepared, and pictures kept as latents."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from uae_jax.data import latents, pairs
from uae_jax.data.images import BadImage
from uae_jax.errors import UserError


def feature(kind, **more):
    return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", **more}


@pytest.fixture
def dataset(tmp_path):
    """pairs/1.0.0 of three pictures, of shades 0, 40 and 80, as TFDS writes array_record."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    folder = tmp_path / "pairs" / "1.0.0"
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "pairs-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(tmp_path / "x.png")
        values = {"image": (tmp_path / "x.png").read_bytes(), "caption": f"text {i}".encode()}
        values = {k: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[v])) for k, v in values.items()}
        example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=values))
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "train",
        "shardLengths": ["3"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"fileFormat": "array_record", "name": "pairs", "version": "1.0.0", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    image = {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}}
    features = {
        "image": feature("image_feature.Image", image=image),
        "caption": feature("text_feature.Text", text={}),
    }
    everything = feature("features_dict.FeaturesDict", featuresDict={"features": features})
    (folder / "features.json").write_text(json.dumps(everything))
    return folder


def test_pairs_of_tfds(dataset):
    found = pairs.TfdsPairs(dataset, "train", "image", "caption")
    assert [found[i].caption for i in range(len(found))] == ["text 0", "text 1", "text 2"]
    for i in range(3):
        np.testing.assert_array_equal(pairs.picture(found[i], 8), np.full((8, 8, 3), 40 * i))
    assert len(pairs.TfdsPairs(dataset, "train[:2]", "image", "caption")) == 2


def test_what_is_no_such_dataset(dataset, tmp_path):
    for arguments, said in (
        ((tmp_path, "train", "image", "caption"), "has prepared"),
        ((dataset, "test", "image", "caption"), "no split 'test'"),
        ((dataset, "train", "image", "captions/text"), "no feature 'captions/text': there is"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            pairs.TfdsPairs(*arguments)
        assert "\n" not in str(caught.value)


def encode(images):
    """What stands for a VAE: the mean of each picture."""
    encode.calls += len(images)
    return images.mean((1, 2), keepdims=True).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    """Five pictures, the third broken."""
    encode.calls = 0
    for i in range(5):
        Image.fromarray(np.full((9, 9, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    return [pairs.Pair(tmp_path / f"{i}.png", str(i)) for i in range(5)]


def test_pictures_are_encoded_once(files, tmp_path):
    folder = tmp_path / "kept"
    for _ in range(2):
        found = latents.cached(folder, files, 8, encode, batch=2, rows=3)
        for i in (0, 1, 3, 4):
            assert found[i].shape == (1, 1, 3) and (found[i] == 10 * i).all()
        with pytest.raises(BadImage):
            found[2]
        assert encode.calls == 6
    # ... and one that was stopped goes on
    for name in ("index.json", "00001.safetensors"):
        (folder / name).unlink()
    assert (latents.cached(folder, files, 8, encode, batch=2, rows=3)[4] == 40).all() and encode.calls == 8
    (folder / "00001.safetensors").unlink()
    with pytest.raises(UserError, match="encoded again"):
        latents.cached(folder, files, 8, encode, batch=2, rows=3)


def test_they_are_those_of_the_same_vae_and_pictures_only(files, tmp_path):
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    (vae / "model.safetensors").write_bytes(b"abc")

    def key(dtype="float32", size=8):
        return latents.key(vae, dtype, size, latents.identity(files))

    first = key()
    assert first == key() and len({first, key("bfloat16"), key(size=16)}) == 3
    (vae / "model.safetensors").write_bytes(b"abd")
    second = key()
    Image.fromarray(np.zeros((12, 9, 3), np.uint8)).save(files[0].image)
    assert len({first, second, key()}) == 3


def test_batches_hold_latents_in_place_of_pictures(files, tmp_path):
    class Words:
        def encode_batch(self, texts, add_special_tokens):
            return [type("Encoding", (), {"ids": [int(text) + 1]}) for text in texts]

    kept = latents.cached(tmp_path / "kept", files, 8, encode, batch=2)
    settings = {
        "image_size": 8,
        "batch_size": 5,
        "length": 3,
        "end_token": 0,
        "dropout": 0.0,
        "negative": (),
        "seed": 0,
    }
    images = pairs.PairBatches(files, Words(), **settings)[0]
    found = pairs.PairBatches(files, Words(), **settings, latents=kept)[0]
    assert found.keys() == {"moments", "tokens", "length"}
    np.testing.assert_array_equal(found["moments"][:, 0, 0], images["image"][:, 0, 0])
    jax.tree.map(np.testing.assert_array_equal, found["tokens"], images["tokens"])
