"""Answers a file of queries in a batch, into Parquet; trains first where the model is not there. Run again, it resumes.

python -m jobs.predict configs/quickstart.yaml --queries queries.tsv --output answers.parquet
python -m jobs.predict configs/quickstart.yaml --queries 'queries/*.csv.gz' predict.top_k=3 predict.filter_known=true
python -m jobs.predict configs/quickstart.yaml predict.queries=queries.jsonl predict.on_bad_row=skip predict.workers=8
ray job submit --working-dir . -- python -m jobs.predict configs/quickstart.yaml --queries s3://bucket/queries.parquet
"""

from kgray.pipeline.command import main

if __name__ == "__main__":
    raise SystemExit(main("predict"))
