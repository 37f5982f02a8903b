"""Flower ClientApp of one hospital: decode, call, encode.

It routes the requests of common/messages (docs/messages.md) to the handlers in
client/training. Errors leave the hospital as a code, never as text.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgex.client.ledger.ledger import LedgerError
from fedgex.client.ledger.released_sums import SumsError
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.client.training import answers, secure_round
from fedgex.client.training.secure_round import ExchangeError
from fedgex.client.training.standardisation import ScaleError
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, DataError, MessageError
from fedgex.common.messages.fields import Server
from fedgex.common.messages.replies import Refusal, Reply
from fedgex.common.messages.requests import (
    SecureRequest,
    StudyRequest,
    TrainRequest,
    read_request,
)
from fedgex.common.system.files import disk_full

logger = logging.getLogger(__name__)

SITES_VARIABLE = "FEDGEX_SITES"
"""Environment variable with the folder of simulated sites; the partition number is the
index of a site by name. A hospital's node is configured with `site-toml` instead."""

app = ClientApp()
Handler = Callable[[Any, SiteSettings], Reply]


def answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Wrap a handler for Flower: read and check the request, turn errors into codes."""

    @wraps(handler)
    def reply(message: Message, context: Context) -> Message:
        reply: Reply
        try:
            settings = SiteSettings.load(_site_toml(context))
            kind = message.metadata.message_type
            request = read_request(kind, message.content)
            assert isinstance(request, StudyRequest), "the gate answers all others"
            _refuse_other_version(request.server)
            _refuse_unpermitted(request, settings.policy)
            torch.set_num_threads(settings.policy.threads)
            reply = handler(request, settings)
        except DataError as error:
            logger.error("refused: %s", error)
            code = next(f.code for f in error.findings if f.severity == "error")
            reply = Refusal.of(code)
        except (ConfigError, MessageError) as error:
            logger.error("refused: %s", error)
            reply = Refusal.of(Code.STUDY_REFUSED)
        except (LedgerError, ExchangeError, ScaleError, SumsError) as error:
            logger.error("refused: %s", error)
            reply = Refusal.of(error.code)
        except Exception as error:  # its text could name a patient and must not leave
            logger.exception("failed")
            reply = Refusal.of(_failure(error))
        return Message(reply.to_records(), reply_to=message)

    return reply


app.query("prepare")(answer(answers.introduce))
app.query("statistics")(answer(answers.moments))
app.query("cross_products")(answer(answers.cross_products))
app.train()(answer(secure_round.masked(answers.train)))
app.query("secagg_keys")(answer(secure_round.advertise(answers.reported_genes)))
app.query("secagg_shares")(answer(secure_round.share))
app.query("secagg_confirm")(answer(secure_round.confirm))
app.query("secagg_unmask")(answer(secure_round.unmask))


def _site_toml(context: Context) -> Path:
    """Return the settings file of this node's site."""
    named = context.node_config.get("site-toml")
    if named is not None:
        return Path(str(named))
    folder = os.environ.get(SITES_VARIABLE)
    if folder is None:
        raise ConfigError(
            "this node has no site-toml in its node config, and "
            f"{SITES_VARIABLE} is not set; name the hospital's site.toml."
        )
    sites = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    return sites[int(context.node_config["partition-id"])] / "site.toml"


def _refuse_other_version(server: Server | None) -> None:
    """Refuse a server of another major or minor version than this site's."""
    theirs = "unknown" if server is None else server.version
    ours = version("fedgex")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        wanted = ".".join(ours.split(".")[:2])
        raise ConfigError(
            f"the server runs fedgex {theirs}, this site {ours}; expected the same "
            f"major and minor version. Install {wanted} there, or theirs here."
        )


def _refuse_unpermitted(request: StudyRequest, policy: Policy) -> None:
    """Refuse a study, or a phase of it, that the policy does not permit."""
    phases: tuple[str, ...] = ()
    if isinstance(request, TrainRequest | SecureRequest):
        phases = (request.round.phase,)
    if against := policy.objections(request.study, phases):
        raise ConfigError(" ".join(against))


def _failure(error: Exception) -> Code:
    """Return the code of an unforeseen error."""
    # On a CPU, torch reports exhausted memory only in the text.
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or on_cpu:
        return Code.OUT_OF_MEMORY
    if disk_full(error):
        return Code.DISK_FULL
    lost = isinstance(error, torch.AcceleratorError)
    return Code.DEVICE_LOST if lost else Code.FAILED
