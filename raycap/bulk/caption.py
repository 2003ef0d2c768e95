"""Checkpoint + folder or bucket of images -> one caption row per image. Run again to resume. The life of a run:

1. open checkpoint and scorer, list the images once; what cannot work is refused before anything is written
2. claim the output with job.json; a run with another checkpoint or other settings is refused
3. create manifest.parquet, or take the one that is there: all runs share the first listing
4. Ray Data makes the units that are missing, each created once under a name that follows from the plan
5. read all units back, compare them with the manifest, and create _SUCCESS.json
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

from raycap import cluster, storage, units
from raycap.bulk import plan, verify
from raycap.bulk.progress import Progress, reporting, table
from raycap.bulk.run import run_units
from raycap.bulk.unit import CaptionsPixels
from raycap.captioner import Captioner
from raycap.checkpoint import SEAL, CheckpointSpec, open_spec
from raycap.config import CaptionBucketConfig, compute_dtype, default_root
from raycap.data.demo import LAST_OF_BUCKET, demo_bucket, given_or_demo
from raycap.errors import CheckpointError, StorageError, UserError
from raycap.schema import caption_schema
from raycap.scorer import chosen_by, scorer_fingerprint
from raycap.storage import Entry

Report = Callable[[str], None]


def caption_bucket(config: CaptionBucketConfig) -> dict[str, Any]:
    """The totals in <out>/_SUCCESS.json once every image has its row. An output that is finished is returned as it is.

    Raises UserError, StorageError or CheckpointError for what cannot work as given, before anything is written;
    StorageError if the storage fails on the way: what is committed by then stays, and the next run makes the rest.
    """
    report: Report = functools.partial(print, flush=True)
    checkpoint, images = _inputs(config)
    plan.check_roots(images, config.out)
    spec = open_spec(checkpoint, prompt=config.prompt)
    plan.decode_settings(config, spec)
    scorer = scorer_fingerprint(config.scorer, spec.image, checkpoint)
    begun = _check_begun(config, images, spec, scorer)
    if begun and storage.exists(storage.join(config.out, plan.SUCCESS)):
        _describe(config.out, config.format)  # which an older raycap left out
        return _finished(config.out, images, report)
    entries, others = plan.list_images(images, config.out, plan.suffixes_of(config), leftovers=config.leftovers)
    if others:
        report(f"other files below {images}, which get no row: {plan.describe_counts(others)}")
    device, dtype = _connect(config, images)
    job = plan.make_job(config, images, spec, dtype, scorer)
    plan.check_readable(images, entries)  # of a run that goes on too: access may be gone since
    units.claim(storage.join(config.out, plan.PLAN), plan.make_plan(config, images, spec, dtype, scorer))
    load = functools.partial(
        load_captioner, checkpoint, spec.fingerprint, device, dtype, config.prompt, config.scorer, scorer
    )
    report(
        f"captioning {images} with {checkpoint}{'' if spec.verified else ' (unverified: no raycap.json vouches for it)'} on "
        f"{device} in {dtype}, {job.settings}{f', {chosen_by(config.scorer)}' if scorer else ''}"
    )
    return _make(config, job, entries, load, device, report)


def load_captioner(
    source: str,
    fingerprint: str,
    device: str,
    dtype: Literal["fp32", "bf16"],
    prompt: str,
    scorer: str = "",
    fingerprint_of_scorer: str = "",
) -> Captioner:
    """The captioner in its process. Raises CheckpointError if checkpoint or scorer is not the one the run began with."""
    import torch

    if device == "cpu":
        torch.set_num_threads(1)  # one Ray CPU each
    captioner = Captioner.load(source, device=device, dtype=dtype, prompt=prompt, scorer=scorer)
    used = [("checkpoint", source, captioner.fingerprint, fingerprint)]
    if captioner.scorer is not None:
        used.append(("scorer", scorer, captioner.scorer.fingerprint, fingerprint_of_scorer))
    for what, place, found, begun in used:
        if found != begun:
            raise CheckpointError(
                f"{what} {place!r} was replaced while it was used: its fingerprint is {found!r}, not {begun!r}; bring it back or "
                f"choose another --out"
            )
    return captioner


def _make(
    config: CaptionBucketConfig,
    job: plan.Job,
    entries: list[Entry],
    load: Callable[[], CaptionsPixels],
    device: str,
    report: Report,
) -> dict[str, Any]:
    """Manifest, units, marker."""
    manifest = plan.create_manifest(config.out, entries)
    pending = plan.pending_units(job, manifest.num_rows)
    num_units = job.num_units(manifest.num_rows)
    drift = plan.check_drift(job, manifest, entries, pending)
    if drift:
        report(f"since they were listed, images below {job.images} changed: {drift}")
    left = sum(plan.rows_of(job, manifest, unit).num_rows for unit in pending)
    report(
        f"{manifest.num_rows} images in {num_units} units; {num_units - len(pending)} done before, {len(pending)} to do"
    )
    progress = Progress(manifest.num_rows, manifest.num_rows - left)
    with reporting(progress, report):
        run_units(
            job,
            manifest,
            pending,
            load,
            progress,
            concurrency=config.concurrency,
            cpus_for_data=config.cpus_for_data,
            num_gpus=config.num_gpus if device == "cuda" else 0.0,
        )
    errors = verify.verify_units(job, manifest)
    verify.check_unreadable(errors, manifest.num_rows, config.max_error_rate, config.out)
    _describe(config.out, job.format)
    summary = verify.seal(job, manifest.num_rows, errors, progress.elapsed_s)
    report(table(summary))
    report(f"wrote {summary['num_images']} rows to {storage.join(config.out, plan.DATA)}")
    return summary


def _describe(out: str, format: str) -> None:
    about = "Captions by raycap, one row per image; a row without a caption has an error_kind."
    units.describe(out, f"{plan.DATA}/*.{format}", "train", about, caption_schema() if format == "jsonl" else None)


def _inputs(config: CaptionBucketConfig) -> tuple[str, str]:
    """Checkpoint and images, the demo's where none are given. Raises UserError if the demo is not there."""
    demo, words = default_root("demo"), {"to": "caption", "flags": "--checkpoint and --images"}
    return (
        given_or_demo(config.checkpoint, storage.join(demo, "checkpoint"), SEAL, **words),
        given_or_demo(config.images, demo_bucket(demo), LAST_OF_BUCKET, **words),
    )


def _check_begun(config: CaptionBucketConfig, images: str, spec: CheckpointSpec, scorer: str) -> bool:
    """Whether out was begun, by the same plan. Raises StorageError if by another; before Ray is started."""
    url = storage.join(config.out, plan.PLAN)
    if not storage.exists(url):
        if storage.exists(storage.join(config.out, plan.SUCCESS)):
            raise StorageError(
                f"{config.out!r} has a {plan.SUCCESS} but no {plan.PLAN}, so another program wrote it; choose another --out"
            )
        return False
    # What auto stands for is known when the cluster is; until then it is what the output was begun with.
    dtype = str(plan.read_plan(config.out).get("dtype")) if config.dtype == "auto" else config.dtype
    units.claim(url, plan.make_plan(config, images, spec, dtype, scorer))
    return True


def _finished(out: str, images: str, report: Report) -> dict[str, Any]:
    summary = verify.read_summary(out)
    report(table(summary))
    report(f"this run is finished: {storage.join(out, plan.DATA)} holds {summary['num_images']} rows of {images}")
    return summary


def _connect(config: CaptionBucketConfig, images: str) -> tuple[str, Literal["fp32", "bf16"]]:
    """Device and dtype of the captioners on the cluster, which is checked to hold the run."""
    cluster.connect(
        num_cpus=config.concurrency + config.cpus_for_data,
        num_gpus=cluster.gpus_for(config.concurrency, config.num_gpus) if config.device == "cuda" else 0,
        need=f"--concurrency {config.concurrency} captioners + --cpus-for-data {config.cpus_for_data}",
    )
    cluster.check_shared(config.out)
    if not storage.is_url(images) and cluster.num_nodes() > 1 and (blind := cluster.nodes_without(images)):
        raise UserError(
            f"--images {images!r} is a local folder that {len(blind)} of {cluster.num_nodes()} nodes do not see "
            f"({', '.join(blind[:3])}); give a folder on shared storage or an s3:// URL"
        )
    on_gpu = cluster.use_gpus(config.device, config.concurrency, "--concurrency", config.num_gpus)
    return "cuda" if on_gpu else "cpu", compute_dtype(config.dtype, on_gpu)
