"""No test needs a network, and none may ask one: hub look-ups end at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
