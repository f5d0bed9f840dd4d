"""``python -m fedsparse.correlations``, which is ``python -m fedsparse.studies.correlations`` now."""

from __future__ import annotations

from fedsparse.renamed import renamed
from fedsparse.studies.correlations import main

if __name__ == "__main__":
    renamed("correlations", "studies.correlations")
    main()
