"""Why the model answers what it answers: addends of the score, rules with their facts, paths, facts it hangs on.

python -m jobs.explain configs/quickstart.yaml --head virus --relation causes             # the best answers
python -m jobs.explain configs/quickstart.yaml --head virus --relation causes --tail neoplastic_process
python -m jobs.explain configs/quickstart.yaml --head virus --relation causes --filter-known --top 1 --json
ray job submit --working-dir . -- python -m jobs.explain configs/quickstart.yaml --head virus --relation causes
"""

from kgray.pipeline.explain_command import main

if __name__ == "__main__":
    raise SystemExit(main())
