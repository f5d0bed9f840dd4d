"""``python -m fedsparse.pretrain``, which is ``python -m fedsparse.studies.pretrain`` now."""

from __future__ import annotations

from fedsparse.renamed import renamed
from fedsparse.studies.pretrain import main

if __name__ == "__main__":
    renamed("pretrain", "studies.pretrain")
    main()
