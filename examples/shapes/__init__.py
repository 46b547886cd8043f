# SPDX-License-Identifier: Apache-2.0
"""The Shapes world: a text-to-image world small enough to train, align and distil on two CPU cores."""
