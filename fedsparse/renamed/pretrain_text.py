"""``python -m fedsparse.pretrain_text``, which is ``python -m fedsparse.studies.pretrain_text`` now."""

from __future__ import annotations

from fedsparse.renamed import renamed
from fedsparse.studies.pretrain_text import main

if __name__ == "__main__":
    renamed("pretrain_text", "studies.pretrain_text")
    main()
