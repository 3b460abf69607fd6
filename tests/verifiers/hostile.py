"""Programs that try what a program under test must not do. Each appends to `did` what it has managed.

`{canary}` is a folder outside the sandbox with a file `secret`, `{pid}` a process that must live on. Loops and floods
are bounded, so that a sandbox that holds nothing does not harm the machine that runs the test.
"""

HOSTILE = {
    "read a file outside": "did.append(open('{canary}/secret').read())",
    "read the passwords": "did.append(open('/etc/passwd').read())",
    "read a neighbour's environment": "did.append(open('/proc/{pid}/environ', 'rb').read())",
    "read its own token": "import os\nif 'SECRET_TOKEN' in os.environ: did.append(1)",
    "list a folder": "import os\ndid.append(os.listdir('{canary}'))",
    "list the root": "import os\ndid.append(os.listdir('/'))",
    "write a file": "open('{canary}/written', 'w').write('x'); did.append(1)",
    "write into the temporary folder": "open('/tmp/evertune-hostile', 'w').write('x'); did.append(1)",
    "write into the working folder": "open('here', 'w').write('x'); did.append(1)",
    "write with system calls": "import os\nos.open('{canary}/written', os.O_CREAT | os.O_WRONLY); did.append(1)",
    "truncate a file": "import os\nos.truncate('{canary}/secret', 0); did.append(1)",
    "delete a file": "import os\nos.unlink('{canary}/secret'); did.append(1)",
    "rename a file": "import os\nos.rename('{canary}/secret', '{canary}/moved'); did.append(1)",
    "link a file": "import os\nos.link('{canary}/secret', '{canary}/linked'); did.append(1)",
    "make a symbolic link": "import os\nos.symlink('/etc', '{canary}/written'); did.append(1)",
    "make a folder": "import os\nos.mkdir('{canary}/written'); did.append(1)",
    "change a mode": "import os\nos.chmod('{canary}/secret', 0o4777); did.append(1)",
    "change an owner": "import os\nos.chown('{canary}/secret', 1, 1); did.append(1)",
    "change a time": "import os\nos.utime('{canary}/secret', (0, 0)); did.append(1)",
    "make a device": "import os\nos.mkfifo('{canary}/written'); did.append(1)",
    "fork": "import os\nif os.fork() == 0: os._exit(0)\ndid.append(1)",
    "fork by its number": "import ctypes, os\nn = ctypes.CDLL(None).syscall(57)\nif n == 0: os._exit(0)\n"
    "if n > 0: did.append(1)",
    "start a process": "import subprocess\nsubprocess.run(['/bin/true'], check=True); did.append(1)",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {{}}); did.append(1)",
    "run a shell": "import os\nif os.system('true') == 0: did.append(1)",
    "multiprocess": "import multiprocessing as m\np = m.get_context('fork').Process(target=int)\np.start()\n"
    "did.append(1)",
    "open a TCP connection": "import socket\nsocket.socket(); did.append(1)",
    "send a datagram": "import socket as s\ns.socket(type=s.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))\ndid.append(1)",
    "open a unix socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0hostile'); did.append(1)",
    "make a pair of sockets": "import socket\nsocket.socketpair(); did.append(1)",
    "fetch a page": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9', timeout=1); did.append(1)",
    "kill a neighbour": "import os\nos.kill({pid}, 0); did.append(1)",
    "kill its group": "import os\nos.killpg(os.getpgid({pid}), 0); did.append(1)",
    "have a neighbour signalled": "import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, {pid}); did.append(1)",
    "choose the signal": "import fcntl\nfcntl.fcntl(1, 10, 9); did.append(1)",
    "have a group signalled": "import ctypes\nif ctypes.CDLL(None).fcntl(1, 15, ctypes.byref((ctypes.c_int * 2)(2, 1)))"
    " == 0: did.append(1)",
    "watch a folder": "import fcntl, os\nfcntl.fcntl(os.open('/usr/lib', 0), fcntl.F_NOTIFY, 1); did.append(1)",
    "trace a neighbour": "import ctypes\nif ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0: did.append(1)",
    "leave its session": "import os\nos.setsid(); did.append(1)",
    "become another user": "import os\nos.setuid(1); did.append(1)",
    "change its root": "import os\nos.chroot('/usr'); did.append(1)",
    "leave its namespaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: did.append(1)",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: did.append(1)",
    "raise its limits": "import resource as r\nr.setrlimit(r.RLIMIT_FSIZE, (99, 99)); did.append(1)",
    "make a file in memory": "import os\nos.memfd_create('x'); did.append(1)",
    "load a module of the kernel": "import ctypes\nif ctypes.CDLL(None).syscall(175, 0, 0, 0) == 0: did.append(1)",
}

# Programs that only waste: what counts is that the verdict comes in time and is no pass.
WASTEFUL = {
    "loop for ever": "while True: pass",
    "sleep for ever": "import time\ntime.sleep(3600)",
    "ignore every signal": "import signal\nfor n in (2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "fill memory": "x = []\nfor _ in range(4000): x.append(bytearray(1 << 20))",
    "recurse for ever": "def f(): return f()\nf()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "leave early": "import os\nos._exit(0)",
    "leave politely": "import sys\nsys.exit(0)",
    "say too much": "import os\nfor _ in range(4000):\n    for n in range(3, 9):\n"
    "        try: os.write(n, b'x' * 65536)\n        except OSError: pass",
    "start many threads": "from threading import Thread\nfrom time import sleep\n"
    "for _ in range(2000): Thread(target=sleep, args=(60,)).start()",
}

# Programs that try to be graded right without the answer: `f(3)` should be 9.
FORGED = {
    "an object that equals everything": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "a number that equals everything": "class A(int):\n    __hash__ = int.__hash__\n"
    "    def __eq__(self, other): return True\ndef f(x): return A(1)",
    "a text that equals everything": "class A(str):\n    __hash__ = str.__hash__\n"
    "    def __eq__(self, other): return True\ndef f(x): return A('9')",
    "a look at the caller": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for one in frame.f_locals.values():\n            if isinstance(one, list) and one and one != ['f(3)']:\n"
    "                return one[0]\n        frame = frame.f_back",
    "another encoder": "import sys\nsys.modules['__main__'].encode = lambda *a: {'plain': True}\ndef f(x): return 1",
    "another json": "import json\njson.dumps = lambda *a, **k: '{\"values\": [{\"plain\": true}], \"error\": null}'\n"
    "def f(x): return 1",
    "a reply of its own": "import os\nfor n in range(3, 9):\n    try: os.write(n, b'{\"values\": [{\"plain\": true}], "
    "\"error\": null}')\n    except OSError: pass\nos._exit(0)",
    "an early end in success": "import os\nos._exit(0)",
    "a patched comparison": "import builtins\nbuiltins.bool = lambda *a: True\nbuiltins.all = lambda *a: True\n"
    "def f(x): return 1",
    "the names of the test": "def f(x): return 'f(3) == 9'",
}  # fmt: skip
