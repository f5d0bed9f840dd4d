import unittest

import torch
from mine.losses import Smoothed

from fedsparse import run


class Mine(unittest.TestCase):
    def test_the_three_parts_train(self):
        ran = run(["experiment=mine", "hydra.searchpath=[file://conf]", "federation.rounds=1"])
        self.assertEqual((ran["data"], ran["mask_rule"], ran["rounds"]), ("bright_columns", "heaviest", 1))

    def test_a_tenth_of_the_label_is_spread_over_all_classes(self):
        z, y = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        expected = -(0.9 * z.log_softmax(1)[0, 1] + 0.1 * z.log_softmax(1).mean())
        torch.testing.assert_close(Smoothed.losses(None, lambda x: x, z, y)[0], expected)
