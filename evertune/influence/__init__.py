"""Which training rows pushed a probe down: `order.py` is what is asked, `push.py` how it is answered."""
