"""Prints the chain from an artifact down to the input files and their sha256.

python -m jobs.lineage VERSION configs/quickstart.yaml             # version as in X-Kgray-Model-Version
python -m jobs.lineage VERSION configs/quickstart.yaml --verify    # also hash every file again
python -m jobs.lineage models:/kgray@champion configs/quickstart.yaml
python -m jobs.lineage s3://bucket/kgray/model/0123456789abcdef
python -m jobs.lineage VERSION --storage ~/.kgray/quickstart
ray job submit --working-dir . -- python -m jobs.lineage VERSION configs/quickstart.yaml
"""

from kgray.pipeline.lineage_command import main

if __name__ == "__main__":
    raise SystemExit(main())
