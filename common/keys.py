"""Names on the wire, in one place: message types, records, and their keys."""

# message types that a site answers
PREPARE = "query.prepare"
STATISTICS = "query.statistics"
CROSS_PRODUCTS = "query.cross_products"
TRAIN = "train"

# records of a message
STUDY = "study"
VOCABULARY = "vocabulary"
STANDARDISATION = "standardisation"
MODEL = "model"
ROUND = "round"

# records of a reply
SITE = "site"
MOMENTS = "moments"
PRODUCTS = "cross-products"
UPDATE = "update"
METRICS = "metrics"
REFUSAL = "refusal"

# keys inside records
JSON = "json"
HASH = "hash"
VERSION = "version"
GENES = "genes"
NAME = "name"
PHASE = "phase"
NUMBER = "number"
CODE = "code"
NUM_PATIENTS = "num-patients"
NUM_EXAMPLES = "num-examples"
NUM_LOSS_TERMS = "num-loss-terms"
TRAIN_LOSS = "train-loss"
JUDGED_LOSS = "judged-loss"
SECONDS = "seconds"
SHARES_CROSS_PRODUCTS = "shares-cross-products"
