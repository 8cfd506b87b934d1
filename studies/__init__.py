"""What is measured, above all else: quality, speed, features, and the paper in miniature."""

import support  # noqa: F401  first: Ctrl-C while torch is being imported is no traceback
