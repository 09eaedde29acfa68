"""The embedded data set: drawn cats, made when they are first asked for and kept in the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.data.shards import Manifest

NUM = 4096
