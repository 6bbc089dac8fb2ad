"""The command line: `python -m minsae_jax VERB`, installed as `minsae`."""
import sys
from convert.architecture import check_yaml
from convert.encoder import convert_encoder
from minsae_jax import cli, sharding
from minsae_jax.config import Extract
from minsae_jax.encoder.extract import extract
s = cli.parse(Extract, sys.argv[1:], "x")
sharding.start()
enc,_=convert_encoder(s.checkpoint_path, s.config_path)
for sp in s.split: print(extract(enc,s,sp))
