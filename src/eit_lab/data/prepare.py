"""A config's data set, made ready: fetched when that was asked, then described. Loads torch only to fetch."""

from __future__ import annotations

from eit_lab.config import Config, TorchvisionData
from eit_lab.data.catalog import facts_for
from eit_lab.runs import DataFacts


def prepare(config: Config) -> DataFacts:
    """Facts of the data set, its files fetched first where data.download asks for it and they are not there."""
    if isinstance(config.data, TorchvisionData) and config.data.download:
        from eit_lab.data.small import download

        download(config.data)
    return facts_for(config)
