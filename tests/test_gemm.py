import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.gemm import matmul


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 120), k=st.sampled_from([1, 64, 257, 900]), m=st.sampled_from([1, 80, 600]))
def test_any_shape_gives_the_product(n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((n, k)), rng.standard_normal((k, m))

    product = matmul(a.astype(np.float32), b.astype(np.float32))

    assert product.dtype == np.float32
    np.testing.assert_allclose(product, a @ b, atol=2e-4 * np.sqrt(k))
