"""Data for training, made ready beforehand.

    python -m uae_jax.data prepare --path=FOLDER|FILE.jsonl --out=DIR [--rows=1024]
    python -m uae_jax.data verify DIR

`prepare` writes a folder of pictures (with the captions of its metadata.jsonl, where it has one) or a jsonl file of
{"image": path, "caption": text} as array_record shards with a manifest and checksums. Broken pictures are left out and
named in the manifest. Stopped, the same command goes on. Train on it by --config.data.source=array_record
--config.data.path=DIR. `verify` compares the shards with the checksums.
"""

import sys
from pathlib import Path

from absl import flags

from uae_jax import runtime
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("path", "", "the folder or jsonl file", flag_values=FLAGS)
flags.DEFINE_string("out", "", "the folder to write", flag_values=FLAGS)
flags.DEFINE_string("image_key", "image", "the picture's field in a jsonl file", flag_values=FLAGS)
flags.DEFINE_string("caption_key", "caption", "the caption's field", flag_values=FLAGS)
flags.DEFINE_integer("rows", 1024, "records a shard", flag_values=FLAGS)
flags.DEFINE_integer("max_bytes", 64 << 20, "larger files are left out", flag_values=FLAGS)
flags.DEFINE_integer("max_pixels", 1 << 26, "larger pictures are left out", flag_values=FLAGS)
USAGE = "usage: python -m uae_jax.data prepare --path=FOLDER|FILE.jsonl --out=DIR, or verify DIR"


def main(arguments: list[str]) -> None:
    """Parses the command line and does it."""
    rest = runtime.parse_flags(FLAGS, arguments)
    from uae_jax.data import images, prepare, records

    if len(rest) == 2 and rest[0] == "verify":
        print(f"{rest[1]}: {prepare.verify(Path(rest[1]))} records, all as the manifest has them")
        return
    if rest != ["prepare"] or not FLAGS.path or not FLAGS.out:
        raise UserError(USAGE)
    path = Path(FLAGS.path)
    if path.is_dir():
        source = records.read_folder(path, FLAGS.caption_key)
    else:
        source = records.read_pairs(path, FLAGS.image_key, FLAGS.caption_key)
    out = Path(FLAGS.out)
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise UserError(f"--out={out} lies in the folder that is read: choose another place")
    prepare.prepare(source, out, FLAGS.rows, images.Limits(FLAGS.max_bytes, FLAGS.max_pixels))


if __name__ == "__main__":
    runtime.run(main, sys.argv)
