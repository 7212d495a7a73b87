"""From triples and text to a traced HTTP answer: ingest, embed, train, evaluate, deploy, each by need.

python -m jobs.pipeline configs/quickstart.yaml
python -m jobs.pipeline configs/quickstart.yaml --keep-serving
python -m jobs.pipeline configs/quickstart.yaml storage.root=/tmp/kgray train.epochs=1   # smoke test
python -m jobs.pipeline configs/quickstart.yaml text=null         # without text
python -m jobs.pipeline configs/quickstart.yaml --show-config
ray job submit --working-dir . -- python -m jobs.pipeline configs/quickstart.yaml
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("pipeline"))
