"""What is said of a device is what a trace's events say; without a device the host's operators are left."""

from types import SimpleNamespace

import pytest

from benchmarks import step_profile


def event(category, name, begin, duration):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": duration,
    }


# Two steps: kernels overlap, a copy lies within one, and the device waits between them.
EVENTS = [
    {"ph": "M", "name": "process_name"},
    event("cpu_op", "aten::mm", 0, 1000),
    event("cuda_runtime", "cudaLaunchKernel", 0, 4),
    event("cuda_runtime", "cudaLaunchKernelExC", 4, 4),
    event("cuda_runtime", "cudaStreamSynchronize", 50, 30),
    event("kernel", "sm90_xmma_gemm_bf16", 100, 40),
    event("kernel", "void at::native::vectorized_elementwise", 120, 40),
    event("gpu_memcpy", "Memcpy HtoD", 130, 10),
    event("kernel", "sm90_xmma_gemm_bf16", 260, 40),
]


def test_what_the_device_did_in_a_step():
    found = step_profile.summarize(EVENTS, steps=2)
    assert found["kernels"] == 1.5 and found["copies"] == 0.5
    assert found["launches"] == 1.0 and found["waits"] == 0.5
    assert found["waited_seconds"] == pytest.approx(15e-6)
    # From 100 to 160 and from 260 to 300 µs, of 200.
    assert found["busy_seconds"] == pytest.approx(50e-6)
    assert found["idle_share"] == pytest.approx(0.5)
    first, *_ = found["by_name"]
    assert first["name"] == "sm90_xmma_gemm_bf16"
    assert first["count"] == 1.0 and first["seconds"] == pytest.approx(40e-6)
    kinds = {row["name"]: row["count"] for row in found["by_kind"]}
    assert kinds == {"products": 1.0, "element by element": 0.5, "copy": 0.5}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("split_embedding_nobag_codegen_forward_unweighted_kernel", "table"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("nvjet_hsh_128x256", "products"),
        ("cub::DeviceRadixSortOnesweepKernel", "sort, scan, unique"),
        ("ncclDevKernel_AllReduce", "collectives"),
        ("something_else", "other"),
    ],
)
def test_a_kernel_is_part_of_something(kernel, kind):
    assert step_profile.kind_of(kernel) == kind


def averages():
    return [
        SimpleNamespace(key="aten::a|b", count=4, self_cpu_time_total=10.0),
        SimpleNamespace(key="aten::mm", count=2, self_cpu_time_total=50.0),
    ]


def record(events):
    result = {
        "tokens": 2304,
        "steps": 2,
        "step_seconds": 0.004,
        "queued_seconds": 0.003,
        "device": step_profile.summarize(events, 2),
        "operators": step_profile.operators(averages(), 2),
    }
    return {"result": result}


def test_the_table_says_what_the_device_did_and_what_the_host():
    text = step_profile.table(record(EVENTS))
    assert "2,304 tokens a step; a step takes 4.00 ms" in text
    assert "busy for 0.05 ms and idle for 50.0% of the time" in text
    assert "| aten::mm " in text and "aten::a¦b" in text
    assert text.index("aten::mm") < text.index("aten::a¦b")


def test_without_a_device_the_operators_are_all_there_is():
    text = step_profile.table(record(EVENTS[:2]))
    assert "No device: nothing is known of kernels." in text
    assert "| aten::mm " in text and "busy" not in text
