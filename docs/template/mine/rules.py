from fedsparse.masks import MaskRule


class Heaviest(MaskRule):
    """The coordinates of largest magnitude."""

    def scores(self, evidence):
        return evidence.row.abs()
