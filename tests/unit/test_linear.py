"""raycap/models/linear.py: which processors take oneDNN's products."""

import pytest

from raycap.models.linear import is_onednn_faster

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n"
INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Platinum 8488C\n"


@pytest.mark.parametrize(
    ("cpu_info", "capability", "faster"),
    [(AMD, "AVX512", True), (AMD, "AVX2", False), (INTEL, "AVX512", False), ("", "AVX512", False)],
)
def test_onednn_computes_only_where_it_is_known_to_be_faster(cpu_info: str, capability: str, faster: bool) -> None:
    assert is_onednn_faster(cpu_info, capability) == faster
