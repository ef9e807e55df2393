"""Fetches one ``config.json`` from the Hugging Face Hub, or from its cache on this machine."""

from __future__ import annotations

from pathlib import Path

from advisor.errors import ConfigError, UnknownNameError

ANSWER_WITHIN_S = 5.0
"""How long the Hub may take to answer before it counts as unreachable."""


def config_file(repository: str, near_names: str) -> Path:
    """The configuration of *repository*: the cached one, else the Hub's.

    *near_names* is the clause about near names in the catalog that every error message ends with.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(repository, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        if constants.HF_HUB_OFFLINE:
            raise _not_asked(repository, "HF_HUB_OFFLINE keeps the Hub from being asked", near_names)
        _reach(hf_hub_url(repository, "config.json"), repository, near_names)
        return Path(hf_hub_download(repository, "config.json", etag_timeout=ANSWER_WITHIN_S))
    except HFValidationError as error:
        raise UnknownNameError(f"{repository!r} is neither a model's name nor a Hub id; {near_names}") from error
    except GatedRepoError as error:
        raise ConfigError(
            f"{repository} asks for its licence to be accepted; accept it on {constants.ENDPOINT}/{repository} "
            f"and log in with `hf auth login`, or take another model; {near_names}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UnknownNameError(f"neither the catalog nor the Hub has a model {repository}; {near_names}") from error
    except LocalEntryNotFoundError as error:
        raise _not_asked(
            repository, f"the Hub answered: {_first_line(error.__cause__ or error)}", near_names
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"{repository} on the Hub has no config.json; {near_names}") from error
    except (HfHubHTTPError, OSError) as error:
        raise _not_asked(repository, f"the Hub answered: {_first_line(error)}", near_names) from error


def _reach(url: str, repository: str, near_names: str) -> None:
    """Ask once whether the Hub answers at all: its own download tries for half a minute where there is no network."""
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=ANSWER_WITHIN_S)
    except Exception as error:
        # Releases of huggingface_hub differ in the library they ask with, and so in what it raises.
        raise _not_asked(repository, f"the Hub cannot be reached ({_first_line(error)})", near_names) from error


def _not_asked(repository: str, reason: str, near_names: str) -> UnknownNameError:
    return UnknownNameError(f"the catalog has no model {repository}, and {reason}; {near_names}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
