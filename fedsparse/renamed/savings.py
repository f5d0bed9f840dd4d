"""``python -m fedsparse.savings``, which is ``python -m fedsparse.bench.savings`` now."""

from __future__ import annotations

from fedsparse.bench.savings import main
from fedsparse.renamed import renamed

if __name__ == "__main__":
    renamed("savings", "bench.savings")
    main()
