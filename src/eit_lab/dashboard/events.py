"""TensorBoard's event files, written with TensorBoard's own protocol buffers: scalars, hyper-parameters, images, text.

A file is opened for each batch of events and closed again, so that a thousand runs can be followed at once.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

Scalar = str | bool | int | float


class EventFile:
    """The one event file of a TensorBoard run, whose name is its folder's path below the log folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns() // 1000}.replay"
        self._append([event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")])

    def _append(self, events: Sequence[Any]) -> None:
        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(event.SerializeToString())
        with self.path.open("ab") as handle:  # one write: a reader finds whole events
            handle.write(content.getbuffer())

    def add_scalars(self, rows: Sequence[tuple[int, float, Mapping[str, float]]]) -> None:
        """Rows of (step, wall time in s, values by tag)."""
        self._append(
            [
                _event([summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in row.items()], step, at)
                for step, at, row in rows
                if row
            ]
        )

    def add_image(self, tag: str, png: bytes, *, step: int, at: float) -> None:
        """A PNG as it is on disk."""
        with Image.open(io.BytesIO(png)) as opened:
            width, height = opened.size
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._append([_event([summary_pb2.Summary.Value(tag=tag, image=image)], step, at)])

    def add_text(self, tag: str, text: str, *, step: int, at: float) -> None:
        """Plain text. TensorBoard takes it for Markdown: as an indented block nothing in it is more than its characters."""
        block = "".join(f"    {line}\n" for line in text.splitlines())
        value = summary_pb2.Summary.Value(
            tag=tag, metadata=text_metadata.create_summary_metadata(None, None), tensor=_strings(block.encode())
        )
        self._append([_event([value], step, at)])

    def add_session(self, hparams: Mapping[str, Scalar], *, group: str, at: float) -> None:
        """What this run is, for the tables of runs; sessions of the same group are shown as one, with their mean."""
        session = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=at)
        for name, value in hparams.items():
            match value:
                case bool():
                    session.hparams[name].bool_value = value
                case str():
                    session.hparams[name].string_value = value
                case _:
                    session.hparams[name].number_value = value
        self._add_hparams(
            hparams_metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=session)
        )

    def end_session(self, *, succeeded: bool, at: float) -> None:
        """That the run is over."""
        status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
        ended = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=at)
        self._add_hparams(
            hparams_metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=ended)
        )

    def add_experiment(self, hparams: Mapping[str, type], metrics: Sequence[str]) -> None:
        """The columns of the tables of runs: hyper-parameters with their type, and tags of scalars."""
        kinds = {str: api_pb2.DATA_TYPE_STRING, bool: api_pb2.DATA_TYPE_BOOL}
        infos = [api_pb2.HParamInfo(name=n, type=kinds.get(t, api_pb2.DATA_TYPE_FLOAT64)) for n, t in hparams.items()]
        tags = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=tags, time_created_secs=time.time())
        self._add_hparams(hparams_metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment))

    def add_bands(self, title: str, bands: Mapping[str, tuple[str, str]]) -> None:
        """Charts of a tag between two others, as (lower, upper), under Custom Scalars."""
        charts = [
            layout_pb2.Chart(
                title=tag,
                margin=layout_pb2.MarginChartContent(
                    series=[layout_pb2.MarginChartContent.Series(value=tag, lower=lower, upper=upper)]
                ),
            )
            for tag, (lower, upper) in bands.items()
        ]
        layout = layout_pb2.Layout(category=[layout_pb2.Category(title=title, chart=charts)])
        value = summary_pb2.Summary.Value(
            tag=layout_metadata.CONFIG_SUMMARY_TAG,
            metadata=layout_metadata.create_summary_metadata(),
            tensor=_strings(layout.SerializeToString()),
        )
        self._append([_event([value], 0, time.time())])

    def _add_hparams(self, tag: str, data: Any) -> None:
        value = summary_pb2.Summary.Value(
            tag=tag, metadata=hparams_metadata.create_summary_metadata(data), tensor=hparams_metadata.NULL_TENSOR
        )
        self._append([_event([value], 0, time.time())])


def _event(values: Sequence[Any], step: int, at: float) -> Any:
    return event_pb2.Event(wall_time=at, step=step, summary=summary_pb2.Summary(value=values))


def _strings(*values: bytes) -> Any:
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=values)
