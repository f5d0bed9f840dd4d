"""``python -m fedsparse.attack``, which is ``python -m fedsparse.studies.attack`` now."""

from __future__ import annotations

from fedsparse.renamed import renamed
from fedsparse.studies.attack import main

if __name__ == "__main__":
    renamed("attack", "studies.attack")
    main()
