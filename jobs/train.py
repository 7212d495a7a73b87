"""Trains the model on graph and vectors; builds those first where they are not there. Run again, it resumes.

python -m jobs.train configs/quickstart.yaml
python -m jobs.train configs/quickstart.yaml train.epochs=3 train.workers=2
python -m jobs.train configs/quickstart.yaml --show-config
ray job submit --working-dir . -- python -m jobs.train configs/quickstart.yaml
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("train"))
