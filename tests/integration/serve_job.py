"""What a Ray job runs in the test of the local head: deploy the model artifact URI at PORT, and end."""

import sys

from kgray.artifact import Artifact
from kgray.runtime import ray_session
from kgray.serving.config import ServeConfig
from kgray.serving.deploy import deploy

if __name__ == "__main__":
    uri, port = sys.argv[1:]
    with ray_session():
        result = deploy(ServeConfig(port=int(port)), Artifact.load(uri))
    print(f"deployed {result.version}, up to date: {result.up_to_date}")
