"""Ranks the test triples and writes the report; trains first where the model is not there.

python -m jobs.evaluate configs/quickstart.yaml
python -m jobs.evaluate configs/quickstart.yaml evaluate.ablations=true
python -m jobs.evaluate configs/quickstart.yaml --show-config
ray job submit --working-dir . -- python -m jobs.evaluate configs/quickstart.yaml
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("evaluate"))
