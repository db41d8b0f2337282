"""Reads what TensorBoard's tab HPARAMS shows of one run."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata


def row_of_table(events: EventAccumulator) -> tuple[dict[str, object], list[str]]:
    """The settings of a run, and the tags of its results."""
    contents = events.PluginTagToContent(metadata.PLUGIN_NAME)
    session = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    assert metadata.SESSION_END_INFO_TAG in contents
    assert {info.name for info in experiment.hparam_infos} == set(session.hparams)
    settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    return settings, [info.name.tag for info in experiment.metric_infos]
