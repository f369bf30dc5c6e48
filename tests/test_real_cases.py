"""Five differences that people asked about in public are found, and located to their line."""

import pytest
import real_cases


@pytest.mark.parametrize(
    ("case", "codes"),
    [
        (real_cases.a_product_whose_sums_depend_on_the_batch, {"sum-order", "matmul-precision"}),
        (real_cases.a_key_of_the_process, {"process-index"}),
        (real_cases.files_in_the_order_of_the_folder, {"file-order"}),
        (real_cases.double_precision_switched_on, {"x64", "instruction-set"}),
    ],  # the fifth one needs eight devices: test_determinism_sharded.py
)
def test_the_line_is_named(case, codes, tmp_path):
    needs_folder = case is real_cases.files_in_the_order_of_the_folder
    assert real_cases.assert_located(case(tmp_path) if needs_folder else case()) == codes
