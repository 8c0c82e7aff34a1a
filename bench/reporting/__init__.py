# SPDX-License-Identifier: MIT
"""How the results of a run become tables, targets, predictions and plots."""
