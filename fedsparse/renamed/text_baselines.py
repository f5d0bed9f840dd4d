"""``python -m fedsparse.text_baselines``, which is ``python -m fedsparse.studies.text_baselines`` now."""

from __future__ import annotations

from fedsparse.renamed import renamed
from fedsparse.studies.text_baselines import main

if __name__ == "__main__":
    renamed("text_baselines", "studies.text_baselines")
    main()
