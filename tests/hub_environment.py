"""For the tests the Hub is a server on this machine; to be imported before anything that imports the Hub's client."""

import atexit
import os
import shutil
import tempfile

from hub_server import HubServer, start_hub


HUB: HubServer = start_hub()

os.environ.pop("HF_HUB_OFFLINE", None)
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_TOKEN"] = "hf_write"
_HOME = tempfile.mkdtemp(prefix="trl_bilevel_tests_")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["HF_HOME"] = _HOME
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
