# SPDX-License-Identifier: Apache-2.0
"""The command line."""

from .main import main as main
from .main import train as train
