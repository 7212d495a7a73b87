"""Serves the model over HTTP and proves it with real requests; trains first where the model is not there.

python -m jobs.deploy configs/quickstart.yaml                    # start, ask, print, end
python -m jobs.deploy configs/quickstart.yaml --keep-serving     # start, ask, print, stay until Ctrl-C
ray job submit --working-dir . -- python -m jobs.deploy configs/quickstart.yaml    # stays on the cluster
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("deploy"))
