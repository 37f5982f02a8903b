"""Names on the wire: message types, records, and their keys (messages/fields.py)."""

# message types that a site answers
PREPARE = "query.prepare"
STATISTICS = "query.statistics"
CROSS_PRODUCTS = "query.cross_products"
TRAIN = "train"
CONTRACT = "query.contract"
RELEASE = "query.release"

# those of secure aggregation, around `train`
SECURE_KEYS = "query.secagg_keys"
SECURE_SHARES = "query.secagg_shares"
SECURE_CONFIRM = "query.secagg_confirm"
SECURE_UNMASK = "query.secagg_unmask"
SECURE = (SECURE_KEYS, SECURE_SHARES, SECURE_CONFIRM, SECURE_UNMASK)

# records of a message
STUDY = "study"
VOCABULARY = "vocabulary"
STANDARDISATION = "standardisation"
MODEL = "model"
ROUND = "round"

# records that a message holds besides, in a run between hospitals
RUN = "run"
RECEIPT = "receipt"
SERVER = "server"
SIGNED_CONTRACT = "contract"
REVOCATIONS = "revocations"
BUNDLE = "bundle"

# records of secure aggregation, in messages, replies, or both
EXCHANGE = "secagg"
PUBLIC_KEYS = "secagg-keys"
BOXES = "secagg-boxes"
CONFIRMATIONS = "secagg-confirmations"
SEED_SHARES = "secagg-seed-shares"
MASK_SHARES = "secagg-mask-shares"

# records of a reply
SITE = "site"
MOMENTS = "moments"
PRODUCTS = "cross-products"
UPDATE = "update"
MASKED = "masked"
METRICS = "metrics"
REFUSAL = "refusal"
PART = "part"
WITHHELD = "withheld"

# keys inside records that code outside of messages/fields.py names
JSON = "json"
NUM_PATIENTS = "num-patients"
NUM_EXAMPLES = "num-examples"
NUM_LOSS_TERMS = "num-loss-terms"
PRE_TRAINING_LOSS = "judged-loss"
SIGNATURE = "signature"
CERTIFICATE = "certificate"
ATTEMPT = "attempt"

WEIGHTED_BY = {"patients": NUM_EXAMPLES, "loss-terms": NUM_LOSS_TERMS}
"""Metric by which updates are weighted, for each `strategy.weights` that needs one."""
