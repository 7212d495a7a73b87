"""Reads triples, tables and documents into a graph (and a corpus) of dense ids, and audits them.

python -m jobs.ingest configs/quickstart.yaml
python -m jobs.ingest configs/quickstart.yaml data.on_bad_row=skip graph.partitions=8
python -m jobs.ingest configs/quickstart.yaml --show-config
ray job submit --working-dir . -- python -m jobs.ingest configs/quickstart.yaml
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("ingest"))
