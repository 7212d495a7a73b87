"""Turns the texts of entities and relations into vectors; builds the graph first where it is not there.

python -m jobs.embed configs/quickstart.yaml
python -m jobs.embed configs/quickstart.yaml text.encoder=intfloat/e5-small-v2
python -m jobs.embed configs/quickstart.yaml --show-config
ray job submit --working-dir . -- python -m jobs.embed configs/quickstart.yaml
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("embed"))
