"""Every source file has a test file of its name, or a line here that says which test file covers it."""

from __future__ import annotations

from pathlib import Path

from conftest import ROOT

COVERED: dict[str, tuple[str, ...]] = {
    "bench/test_counters.py": ("bench/fidelity.py", "bench/instruments.py"),
    "bench/test_formats.py": ("bench/plots.py", "bench/report.py"),
    "bench/test_gpu.py": ("bench/device_times.py", "bench/layers_tensorrt.py"),
    "bench/test_layers.py": ("bench/layers_onnxruntime.py", "bench/layers_openvino.py", "bench/operators.py"),
    "bench/test_machine.py": ("bench/machine_noise.py", "bench/steady_work.py", "bench/throttle.py"),
    "bench/test_run.py": ("bench/environment.py", "bench/measure.py", "bench/metrics.py", "bench/result.py"),
    "bundle/test_bundle.py": ("bundle/folder.py", "bundle/graphs.py", "bundle/manifest.py", "runtime/verify.py"),
    "cli/test_app.py": ("__main__.py", "cli/doctor.py", "errors.py"),
    "cli/test_bench.py": ("cli/bench_tables.py",),
    "cli/test_output.py": ("cli/progress.py",),
    "bundle/test_signature.py": ("cli/sign.py",),
    "compile/test_compile.py": (
        *("cli/compile.py", "compile/compilers.py", "compile/options.py", "compile/shapes.py"),
        *("compile/tensorrt.py", "compile/tensorrt_network.py", "compile/worker.py", "engines/record.py"),
    ),
    "compile/test_onnxruntime.py": (
        *("compile/optimized_model.py", "runtime/backends/onnxruntime/engine.py"),
        "runtime/backends/onnxruntime/model.py",
    ),
    "export/adapters/test_embedding.py": ("export/adapters/png_embedding.py",),
    "export/adapters/test_hypernetwork.py": ("export/adapters/hypernetwork_weights.py",),
    "export/adapters/test_spelling.py": ("export/adapters/numbered.py", "export/fitting.py"),
    "export/families/test_families.py": (
        *("export/families/family.py", "export/families/others.py", "export/families/recognise.py"),
        *("export/families/sd1.py", "export/families/table.py"),
    ),
    "export/families/test_key_lists.py": (
        "export/families/ldm.py",
        "export/families/sd2.py",
        "export/families/sdxl.py",
    ),
    "export/networks/test_networks.py": (
        *("export/networks/attention.py", "export/networks/clip.py", "export/networks/step.py"),
        *("export/networks/unet.py", "export/networks/vae.py"),
    ),
    "export/read/test_checkpoint.py": ("export/architecture.py", "export/read/tensor_entry.py"),
    "export/read/test_model_files.py": ("export/inspect.py", "export/read/diffusers_config.py"),
    "export/read/test_pickles.py": ("export/read/pickle_names.py",),
    "bundle/test_onnx_graph.py": ("bundle/protobuf.py",),
    "export/test_build.py": ("export/graph.py", "export/network_outputs.py", "files/cache.py"),
    "export/test_selfcheck.py": ("export/check_operators.py",),
    "export/test_traces.py": ("export/skeletons.py", "export/trace.py"),
    "files/test_faults.py": ("files/lock.py",),
    "hostile/test_command_faults.py": ("compile/watch.py",),
    "hostile/test_input_kinds.py": ("files/read.py",),
    "machine/test_doctor.py": ("engines/targets.py", "machine/packages.py"),
    "runtime/backends/openvino/test_engine.py": (
        *("compile/openvino.py", "engines/shapes.py", "machine/cpu.py", "runtime/backend.py"),
        *("runtime/backends/fallback.py", "runtime/engine.py"),
    ),
    "runtime/backends/onnxruntime_cuda/test_engine.py": ("runtime/backends/onnxruntime_cuda/model.py",),
    "runtime/backends/tensorrt/test_engine.py": (
        *("machine/tensorrt_messages.py", "runtime/backends/tensorrt/blocks.py"),
        *("runtime/backends/tensorrt/capture.py", "runtime/backends/tensorrt/kernels.py"),
        "runtime/backends/tensorrt/picture.py",
        *("runtime/backends/tensorrt/plans.py", "runtime/backends/tensorrt/step.py"),
    ),
    "runtime/pictures/test_settings.py": ("runtime/pictures/infotext.py", "runtime/request_json.py"),
    "runtime/prompts/test_tokenizer.py": ("export/tokenizer.py",),
    "runtime/prompts/test_conditioning.py": ("runtime/prompts/vector.py",),
    "runtime/sampling/test_diffusers.py": ("runtime/sampling/levels.py",),
    "runtime/sampling/test_sigma_samplers.py": ("runtime/sampling/trace.py",),
    "runtime/test_pipeline.py": ("runtime/request.py",),
    "cli/test_generate.py": ("runtime/pictures/contact_sheet.py",),
}
"""Test files, and the source files without a test file of their own that they cover."""


def test_every_source_has_its_test() -> None:
    package, tests = ROOT / "sdrt", ROOT / "tests"
    sources = {
        path.relative_to(package)
        for path in package.rglob("*.py")
        if path.name != "__init__.py"  # they hold imports and docstrings
    }
    own = {source for source in sources if (tests / source.parent / f"test_{source.name}").exists()}
    covered = [Path(source) for each in COVERED.values() for source in each]
    assert sorted(sources - own) == sorted(covered)
    assert not [test for test in COVERED if not (tests / test).is_file()]
