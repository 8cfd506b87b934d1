"""Lets the tests import the project's flat files, wherever pytest is started from."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
