"""``python -m benchmarks`` compares whole commands."""

from __future__ import annotations

import sys

from benchmarks.bench_convert import main

sys.exit(main())
