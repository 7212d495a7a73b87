"""Trains the text encoder on the training triples, as `text.tuning` says; embed then reads with what came of it.

python -m jobs.pretrain configs/quickstart.yaml text.tuning.mode=last_layers
python -m jobs.pretrain configs/quickstart.yaml text.tuning.mode=lora text.tuning.rank=8
ray job submit --working-dir . -- python -m jobs.pretrain configs/quickstart.yaml text.tuning.mode=full
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("pretrain"))
