"""A headless Chromium, driven through chromedriver's WebDriver protocol (Debian: chromium, chromium-driver)."""
import base64
import json
import re
import shutil
import subprocess
from urllib import request

PROGRAMS = ("chromium", "chromedriver")
missing = [name for name in PROGRAMS if not shutil.which(name)]
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --hide-scrollbars")
KEYS = {"right": "\ue014", "left": "\ue012", "home": "\ue011"}  # WebDriver's code points of keys


class Browser:
    def __init__(self):
        self.driver = subprocess.Popen([PROGRAMS[1], "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(found[1] for line in self.driver.stdout if (found := re.search(r"fully on port (\d+)", line)))
        self.url = f"http://127.0.0.1:{port}/session"
        self.send = request.build_opener(request.ProxyHandler({})).open
        wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": {
            "args": FLAGS.split(), "binary": shutil.which(PROGRAMS[0])}}
        self.url += "/" + self.call("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def call(self, path, method="POST", **body):
        content = json.dumps(body).encode() if method == "POST" else None
        sent = request.Request(self.url + path, content, {"Content-Type": "application/json"}, method=method)
        with self.send(sent, timeout=120) as reply:
            return json.load(reply)["value"]

    def run(self, script, *args):
        """The value that a script returns: run("return document.title")"""
        return self.call("/execute/sync", script=script, args=args)

    def devtools(self, command, **params):
        return self.call("/goog/cdp/execute", cmd=command, params=params)

    def press(self, key, times=1):
        actions = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")] * times
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def show(self, url, width=1280, height=1000, scheme="light", scripts=True):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.devtools("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("/url", url="about:blank")
        self.call("/url", url=str(url))

    def console(self):
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.call("/se/log", type="browser")]

    def screenshot(self):
        return base64.b64decode(self.call("/screenshot", "GET"))

    def close(self):
        try:
            self.call("", "DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait()
