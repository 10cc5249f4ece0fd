@echo off
rem Does what `onecard train` does, on a computer that has nothing but Python: the first time, it installs onecard into
rem .venv beside this file. All arguments are passed on:  train.bat rtx-5060-pretrain --dataset my_text.txt
setlocal
chcp 65001 >nul
set "PYTHONUTF8=1"
set "VENV=%~dp0.venv"
if exist "%VENV%\Scripts\onecard.exe" goto run

for %%P in ("py -3.13" "py -3.12" "py -3.11" "py -3" "python") do (
    %%~P -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul && set "PYTHON=%%~P" && goto install
)
echo onecard needs Python 3.11 or newer, and none was found.
echo Install it from https://www.python.org/downloads/ with "Add python.exe to PATH" ticked, then start this again.
exit /b 2

:install
rem On Windows PyPI's torch has no CUDA; with an NVIDIA driver here, take the one that has. Cards older than Turing need
rem cu126 instead:  set ONECARD_TORCH_INDEX=https://download.pytorch.org/whl/cu126
if defined ONECARD_TORCH_INDEX goto create
where nvidia-smi >nul 2>nul && set "ONECARD_TORCH_INDEX=https://download.pytorch.org/whl/cu130"
:create
if defined ONECARD_TORCH_INDEX set "EXTRA_INDEX=--extra-index-url %ONECARD_TORCH_INDEX%"
echo Installing onecard into "%VENV%". This takes some minutes, once.
%PYTHON% -m venv "%VENV%" || goto failed
"%VENV%\Scripts\python.exe" -m pip install --quiet %EXTRA_INDEX% -c "%~dp0constraints.txt" -e "%~dp0." || goto failed

:run
"%VENV%\Scripts\onecard.exe" train %*
exit /b %ERRORLEVEL%

:failed
echo Installation failed; the lines above say why. After that is solved, start this again.
exit /b 2
